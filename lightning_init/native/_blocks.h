/* Σx of each unit and Σx² of one block of float32 numbers.

   A block has about a thousand numbers: 1024 in a row of one unit, or 32 rows of all units. It is added up in float32,
   eight numbers at a time, so that at most 32 are added one after the other. What is added are distances d from a number
   k near their mean: the mean of the first 32 numbers, or each unit's number in the first row. Whatever the mean is,
   rounding then changes a sum of squares by less than a millionth.

   The sums of blocks are added in float64, as Σx = Σd + nk and Σx² = Σd² + k (2 Σd + nk). Float32 is not enough for a
   block whose distances from k are large compared with their own spread, whose squares leave the range of float32, or
   that holds a NaN: such a block is added up once more in float64.

   The vector types are an extension of GCC and Clang, which compile them for any processor. */

#include <stdint.h>
#include <string.h>

typedef float Floats __attribute__((vector_size(32)));
typedef float Half __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(32)));
enum { LANES = 8, HALF = 4, BLOCK = 1024, ROWS = 32, STRIP = 4 };

/* Float32 squares neither vanish nor overflow while their mean is between LEAST and LARGEST. Subtracting the squared mean
   from Σd² leaves a variance; if at least SPREAD of Σd² is left, rounding errors grow by a factor of four at most. */
static const double LEAST = 1e-30, LARGEST = 1e30, SPREAD = 0.25;

#define INLINE static inline __attribute__((always_inline))

INLINE Floats load(const float *x) {
    Floats v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE Doubles load_wide(const float *x) {
    Half v;
    memcpy(&v, x, sizeof v);
    return __builtin_convertvector(v, Doubles);
}

INLINE double total(Doubles v) { return (v[0] + v[1]) + (v[2] + v[3]); }

INLINE double total_of_floats(Floats v) {
    float numbers[LANES];
    memcpy(numbers, &v, sizeof v);
    return total(load_wide(numbers) + load_wide(numbers + HALF));
}

/* Whether the float32 sums of a block are good enough. squares: its Σd²; between: what Σd² would be if every number were
   the mean of its unit. A NaN makes each comparison false. */
INLINE int is_safe(double squares, double between, double count) {
    return squares > LEAST * count && squares < LARGEST * count && squares - between > SPREAD * squares;
}

/* The next two functions are for numbers of one unit, consecutive in memory: they add to *sum and return Σx². */

INLINE double run_in_float64(const float *x, int64_t count, double *sum) {
    Doubles s[4] = {{0}}, q[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * HALF <= count; i += 4 * HALF) {
        for (int k = 0; k < 4; ++k) {
            Doubles v = load_wide(x + i + k * HALF);
            s[k] += v, q[k] += v * v;
        }
    }
    for (; i + HALF <= count; i += HALF) {
        Doubles v = load_wide(x + i);
        s[0] += v, q[0] += v * v;
    }
    double squares = total((q[0] + q[1]) + (q[2] + q[3]));
    *sum += total((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < count; ++i) {
        double v = x[i];
        *sum += v, squares += v * v;
    }
    return squares;
}

INLINE double block(const float *x, int64_t count, double *sum) {
    int64_t i = 0, whole = count - count % (4 * LANES);
    if (whole == 0) return run_in_float64(x, count, sum);
    double k = (float)total_of_floats((load(x) + load(x + LANES)) + (load(x + 2 * LANES) + load(x + 3 * LANES))) / 32;
    Floats s[4] = {{0}}, q[4] = {{0}};
    for (; i < whole; i += 4 * LANES) {
        for (int j = 0; j < 4; ++j) {
            Floats d = load(x + i + j * LANES) - (float)k;
            s[j] += d, q[j] += d * d;
        }
    }
    double distance = total_of_floats((s[0] + s[1]) + (s[2] + s[3]));
    double squares = total_of_floats((q[0] + q[1]) + (q[2] + q[3]));
    if (!is_safe(squares, distance * distance / whole, whole)) return run_in_float64(x, count, sum);
    *sum += distance + whole * k;
    return squares + k * (2 * distance + whole * k) + run_in_float64(x + whole, count - whole, sum);
}

/* The other functions are for rows of all units: they add to sums[units] and return Σx². strip, the part of
   block_of_rows that reads STRIP rows at once, returns Σd². */

INLINE double row_in_float64(const float *x, int64_t units, double *sums) {
    Doubles q[2] = {{0}};
    int64_t u = 0;
    for (; u + 2 * HALF <= units; u += 2 * HALF) {
        for (int k = 0; k < 2; ++k) {
            Doubles v = load_wide(x + u + k * HALF), s;
            memcpy(&s, sums + u + k * HALF, sizeof s);
            s += v, q[k] += v * v;
            memcpy(sums + u + k * HALF, &s, sizeof s);
        }
    }
    double squares = total(q[0] + q[1]);
    for (; u < units; ++u) {
        double v = x[u];
        sums[u] += v, squares += v * v;
    }
    return squares;
}

INLINE double strip(const float *x, const float *k, int64_t units, float *sums) {
    double squares = 0;
    int64_t u = 0;
    while (u + LANES <= units) {
        int64_t end = u + BLOCK / STRIP < units ? u + BLOCK / STRIP : units;
        Floats q[STRIP] = {{0}};
        for (; u + LANES <= end; u += LANES) {
            Floats d[STRIP], s = load(sums + u), centre = load(k + u);
            for (int j = 0; j < STRIP; ++j) d[j] = load(x + j * units + u) - centre, q[j] += d[j] * d[j];
            s += (d[0] + d[1]) + (d[2] + d[3]);
            memcpy(sums + u, &s, sizeof s);
        }
        squares += total_of_floats((q[0] + q[1]) + (q[2] + q[3]));
    }
    for (; u < units; ++u) {
        for (int j = 0; j < STRIP; ++j) {
            float d = x[j * units + u] - k[u];
            sums[u] += d, squares += (double)d * d;
        }
    }
    return squares;
}

/* Adds Σx of every unit, computed from its Σd over ROWS rows where d = x - k; returns Σx² - Σd². */
INLINE double leave_centre(const float *distances, const float *k, int64_t units, double *sums) {
    Doubles more = {0};
    int64_t u = 0;
    for (; u + HALF <= units; u += HALF) {
        Doubles d = load_wide(distances + u), centre = load_wide(k + u), s;
        memcpy(&s, sums + u, sizeof s);
        s += d + ROWS * centre, more += centre * (2 * d + ROWS * centre);
        memcpy(sums + u, &s, sizeof s);
    }
    double rest = 0;
    for (; u < units; ++u) {
        double d = distances[u], centre = k[u];
        sums[u] += d + ROWS * centre, rest += centre * (2 * d + ROWS * centre);
    }
    return total(more) + rest;
}

INLINE double squares_of(const float *x, int64_t count) {
    double unused_sum = 0;
    return run_in_float64(x, count, &unused_sum);
}

INLINE double block_of_rows(const float *x, int64_t units, float *distances, double *sums) {
    double squares = 0;
    memset(distances, 0, units * sizeof *distances);
    for (int row = 0; row < ROWS; row += STRIP) squares += strip(x + row * units, x, units, distances);
    if (is_safe(squares, squares_of(distances, units) / ROWS, (double)ROWS * units)) {
        return squares + leave_centre(distances, x, units, sums);
    }
    squares = 0;
    for (int row = 0; row < ROWS; ++row) squares += row_in_float64(x + row * units, units, sums);
    return squares;
}

INLINE double rows(const float *x, int64_t count, int64_t units, float *distances, double *sums) {
    if (count == ROWS) return block_of_rows(x, units, distances, sums);
    double squares = 0;
    for (int64_t row = 0; row < count; ++row) squares += row_in_float64(x + row * units, units, sums);
    return squares;
}
