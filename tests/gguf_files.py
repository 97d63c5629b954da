"""Shared by the tests: end a GGUF file."""

__all__ = ["save_gguf"]


def save_gguf(writer) -> None:
    """Write what was added to ``writer``, a GGUFWriter, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
