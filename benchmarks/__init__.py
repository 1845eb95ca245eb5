"""Side-by-side measurements against other libraries; results are JSON with the environment."""
