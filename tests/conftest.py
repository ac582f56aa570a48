"""Tests press Ctrl+C on programs they start. A shell has background jobs ignore it, and what they start inherits that."""

import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
