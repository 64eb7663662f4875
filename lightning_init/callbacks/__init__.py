"""The two Lightning callbacks: lifecycle only, no mathematics."""
