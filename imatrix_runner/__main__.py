"""``python -m imatrix_runner`` is the ``imatrix-runner`` command."""

from imatrix_runner.cli.main import main

if __name__ == "__main__":
    main()
