"""Small trained text-to-image model that stock ComfyUI loads, samples and decodes, for tests and benchmarks.

data      emoji images and their names as text features
model     the diffusion transformer (SD3 layout) and the autoencoder (TAESD layout)
train     training in one command: data, autoencoder, diffusion model, LoRA, evaluation, files
evaluate  sampling of the shipped files, and the nearest training image of each sample
place     copy of the shipped files into a ComfyUI folder
graph     workflows with the model
examples  the example workflows with the model
"""
