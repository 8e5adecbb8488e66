"""`python -m mamba_sft` is `mamba-sft`."""

from mamba_sft.cli.app import main

if __name__ == "__main__":
    main()
