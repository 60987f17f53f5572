"""What is measured, and what it is measured against. :mod:`bench.contenders.base` says what each must do."""
