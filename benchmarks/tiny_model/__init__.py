"""A small text-to-image model that stock ComfyUI loads, samples and decodes: real trained weights to measure rounding on.

data      emoji pictures and their names as text features
model     the diffusion transformer (SD3 layout) and the autoencoder (TAESD layout)
train     everything from one command: data, autoencoder, diffusion, LoRA, evaluation, files
evaluate  samples the shipped files and asks which emoji each picture is nearest to
place     copies the shipped files into a ComfyUI folder
"""
