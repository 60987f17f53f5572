"""Learning to defer: scoring, gate initialisation, calibration, and the demo pair's recipe."""
