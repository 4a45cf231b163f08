"""Entry point of ``python -m penult``, which torchrun starts."""

from penult.cli import main

if __name__ == "__main__":
    main()
