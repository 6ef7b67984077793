import sys

from dualhead.cli import main

sys.exit(main())
