"""``python -m clara_fused``: what is installed, which back end each device gets, and why not a better one."""

from .core import describe_installation

if __name__ == "__main__":
    print(describe_installation())
