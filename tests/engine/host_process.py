"""A host in a process of its own, which a test may kill."""

from tests.engine.processes import serve_in_this_process

if __name__ == "__main__":
    serve_in_this_process()
