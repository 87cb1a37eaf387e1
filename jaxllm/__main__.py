"""`python -m jaxllm`: the same as the command `jaxllm`."""

import sys

from jaxllm.cli import main

sys.exit(main())
