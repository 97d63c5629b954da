"""Make PyPI's CUDA build of torchvision importable with a CPU build of torch. Copied into a host's virtual environment.

torchvision registers fake implementations of operators that its extension library declares. With a CPU torch that library
cannot load, and the import fails: "operator torchvision::nms does not exist". Declaring the two operators before
torchvision is imported avoids the error; they have no implementation, and resizing uses neither. An import hook
declares them, so that a process without torchvision does not import torch.
"""

import sys


class DeclareBeforeTorchvision:
    """Import hook that declares the operators when torchvision is first imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            # The reference keeps the declarations: a Library removes them when it is garbage-collected.
            library = torch.library.Library("torchvision", "DEF")
            DeclareBeforeTorchvision.library = library
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None  # the regular finders import the module


sys.meta_path.insert(0, DeclareBeforeTorchvision())
