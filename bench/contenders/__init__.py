"""What is measured, and what it is measured against. :mod:`bench.contenders.interface` says what each must do."""
