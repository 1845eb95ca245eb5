"""Measurements of fipoptim beside other libraries; each result is a JSON file that names the machine and versions."""
