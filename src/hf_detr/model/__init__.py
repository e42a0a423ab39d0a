"""DETR itself: what turns an image into boxes and a loss. Every file here travels with a pushed checkpoint."""
