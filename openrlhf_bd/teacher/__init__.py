"""The teacher: a vLLM engine that records candidate sets, and the jobs that generate and score with it."""
