"""`python -m fastlm.cli`, the same as `fastlm`."""

from fastlm.cli import main

main()
