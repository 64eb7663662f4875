"""The two Lightning callbacks: lifecycle only."""
