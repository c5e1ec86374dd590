BUILD_INFO: dict[str, str]
CUDA_DECISION: str
