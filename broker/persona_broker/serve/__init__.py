"""The processes that serve: gunicorn, its worker, the Flask applications."""
