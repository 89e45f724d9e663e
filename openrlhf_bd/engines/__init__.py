"""vLLM engines: arguments for CPU and GPU, and the plain class that an actor hosts."""
