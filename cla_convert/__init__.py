"""cla-convert: give a pretrained MQA/GQA model Cross-Layer Attention (arXiv 2405.12981) and prove what it cost."""

__version__ = "0.1.0"
