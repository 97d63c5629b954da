"""Lets PyPI's CUDA-linked torchvision be imported beside a CPU torch. Copied into a host's virtual environment.

torchvision registers shape functions for operators that its compiled half declares. That half cannot load here, so
the import would fail at the first of them ("operator torchvision::nms does not exist"). Declaring the two operators
just before torchvision is imported is enough; nothing can call them, and resizing needs neither. A finder does it,
so that a Python that never imports torchvision does not pay for importing torch.
"""

import sys


class DeclareBeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            # Kept alive as long as the process: a Library takes its declarations along when it is collected.
            library = torch.library.Library("torchvision", "DEF")
            DeclareBeforeTorchvision.keep = library
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None  # the usual finders find it


sys.meta_path.insert(0, DeclareBeforeTorchvision())
