/* Σx of each unit and Σx² of float32 numbers in memory, in one pass and on all threads: the fast path of moments.py.
   README.md beside this file is the contract. */

#define _GNU_SOURCE /* RTLD_DEFAULT */
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>

#include "_blocks.h"

/* A tensor [outer, units, inner] is cut into blocks (_blocks.h), and the blocks into shares, at most one per thread. A
   share is worth a thread from WORTH_A_SHARE numbers on, which take about 20 µs to read from memory. */

enum { WORTH_A_SHARE = 1 << 16 };

typedef struct {
    const float *x;
    int64_t outer, units, inner, blocks, shares;
    double *sums;     /* [shares, units], zero before */
    double *squares;  /* [shares] */
    float *distances; /* [shares, units] */
    char *taken;      /* [shares], zero before */
} Task;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t blocks_in(int64_t count, int64_t size) { return (count + size - 1) / size; }

/* Adds x to *sum, and what this rounds away to *lost (Knuth's two-sum): the sums of a hundred thousand equal blocks would
   all be rounded in the same direction. */
INLINE void add(double x, double *sum, double *lost) {
    double before = *sum, after = before + x, added = after - before;
    *lost += (before - (after - added)) + (x - added);
    *sum = after;
}

INLINE double add_blocks(const Task *t, int64_t first, int64_t last, double *sums, float *distances) {
    double squares = 0, lost = 0;
    int64_t per_run = blocks_in(t->inner, BLOCK);
    for (int64_t b = first; b < last; ++b) {
        if (t->inner == 1) {
            const float *x = t->x + b * ROWS * t->units;
            add(rows(x, smaller(ROWS, t->outer - b * ROWS), t->units, distances, sums), &squares, &lost);
        } else {
            int64_t run = b / per_run, start = b % per_run * BLOCK;
            const float *x = t->x + run * t->inner + start;
            add(block(x, smaller(BLOCK, t->inner - start), sums + run % t->units), &squares, &lost);
        }
    }
    return isfinite(lost) ? squares + lost : squares;
}

/* The same code is compiled for every processor of the architecture, and once more for those with AVX2 and FMA. */

typedef double AddBlocks(const Task *, int64_t, int64_t, double *, float *);

static double add_anywhere(const Task *t, int64_t first, int64_t last, double *sums, float *distances) {
    return add_blocks(t, first, last, sums, distances);
}
static AddBlocks *fastest = add_anywhere;

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static double add_with_avx2(const Task *t, int64_t first, int64_t last,
                                                                double *sums, float *distances) {
    return add_blocks(t, first, last, sums, distances);
}
static void choose_processor(void) {
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) fastest = add_with_avx2;
}
#else
static void choose_processor(void) {}
#endif

/* The threads are PyTorch's: threads of our own would compete with them, because they spin while they wait. All of them
   are used, as PyTorch does, because OpenMP ends the threads that a smaller team leaves out. They are looked up when this
   module is imported, so torch has to be imported before. Where they are not found, the calling thread works alone. */

static void (*in_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*max_threads)(void), (*is_parallel)(void), (*thread_number)(void);

static void choose_threads(void) {
#ifdef __linux__
    *(void **)&max_threads = dlsym(RTLD_DEFAULT, "omp_get_max_threads");
    *(void **)&is_parallel = dlsym(RTLD_DEFAULT, "omp_in_parallel");
    *(void **)&thread_number = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    if (max_threads && is_parallel && thread_number) *(void **)&in_parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#endif
}

/* Each thread begins with the share of its own number, whose numbers it has probably just written and still has in its
   cache, and goes on with shares that no other thread has taken: the work is done however many threads come. */
static void take_shares(void *data) {
    Task *t = data;
    int64_t own = t->shares > 1 ? thread_number() : 0;
    for (int64_t i = 0; i < t->shares; ++i) {
        int64_t share = (own + i) % t->shares;
        if (__atomic_exchange_n(t->taken + share, 1, __ATOMIC_RELAXED)) continue;
        t->squares[share] = fastest(t, t->blocks * share / t->shares, t->blocks * (share + 1) / t->shares,
                                    t->sums + share * t->units, t->distances + share * t->units);
    }
}

/* How many shares: at most one per thread, each with enough numbers to be worth a thread (WORTH_A_SHARE) and with at
   least ROWS numbers per unit, so that adding its sums [units] costs less than making them. */
static int64_t shares_of(const Task *t) {
    if (!in_parallel || is_parallel()) return 1;
    int64_t worth = 1 + t->outer * t->units * t->inner / WORTH_A_SHARE, most = 1 + t->outer * t->inner / ROWS;
    return smaller(smaller(max_threads(), worth), smaller(t->blocks ? t->blocks : 1, most));
}

/* Writes Σx of each unit into t->sums and Σx² into *squares, without the GIL; returns 0 if there is no memory. */
static int run(Task *t, double *squares) {
    int64_t units = t->units;
    if (units == 1) t->inner *= t->outer, t->outer = 1;
    t->blocks = t->inner == 1 ? blocks_in(t->outer, ROWS) : t->outer * units * blocks_in(t->inner, BLOCK);
    t->shares = shares_of(t);
    double *sums = t->sums, *memory = calloc(t->shares, (units + 1) * sizeof(double) + units * sizeof(float) + 1);
    if (!memory) return 0;
    t->sums = memory, t->squares = memory + t->shares * units, t->distances = (float *)(t->squares + t->shares);
    t->taken = (char *)(t->distances + t->shares * units);
    Py_BEGIN_ALLOW_THREADS;
    if (t->shares > 1) in_parallel(take_shares, t, 0, 0);
    else take_shares(t);
    memset(sums, 0, units * sizeof *sums);
    *squares = 0;
    for (int64_t i = 0; i < t->shares; ++i) {
        *squares += t->squares[i];
        for (int64_t u = 0; u < units; ++u) sums[u] += t->sums[i * units + u];
    }
    Py_END_ALLOW_THREADS;
    free(memory);
    return 1;
}

static int are_given(Py_ssize_t given, Py_ssize_t wanted) {
    if (given != wanted) PyErr_Format(PyExc_TypeError, "takes %zd arguments, %zd given", wanted, given);
    return given == wanted;
}

static PyObject *by_unit(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    if (!are_given(given, 5)) return NULL;
    double squares;
    Task t = {.x = PyLong_AsVoidPtr(args[0]), .outer = PyLong_AsLongLong(args[1]), .units = PyLong_AsLongLong(args[2]),
              .inner = PyLong_AsLongLong(args[3]), .sums = PyLong_AsVoidPtr(args[4])};
    if (PyErr_Occurred()) return NULL;
    return run(&t, &squares) ? PyFloat_FromDouble(squares) : PyErr_NoMemory();
}

static PyObject *whole(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    if (!are_given(given, 2)) return NULL;
    double sum, squares;
    Task t = {.x = PyLong_AsVoidPtr(args[0]), .outer = 1, .units = 1, .inner = PyLong_AsLongLong(args[1]), .sums = &sum};
    if (PyErr_Occurred()) return NULL;
    return run(&t, &squares) ? Py_BuildValue("dd", sum, squares) : PyErr_NoMemory();
}

static PyMethodDef functions[] = {
    {"by_unit", (PyCFunction)(void (*)(void))by_unit, METH_FASTCALL, NULL},
    {"whole", (PyCFunction)(void (*)(void))whole, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_sums", NULL, 0, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__sums(void) {
    choose_processor();
    choose_threads();
    return PyModule_Create(&definition);
}
