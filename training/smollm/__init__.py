"""The recipe of the demo on a real model: SmolLM2-135M-Instruct and a LoRA expert for ICD-10 codes."""
