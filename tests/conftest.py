"""Tests press Ctrl+C on programs they start, and a shell has its background jobs ignore it, with all they start."""

import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
