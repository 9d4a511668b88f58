"""The test suite's environment. A conftest imports this module before anything imports torch."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait do not spin: beside other programs that costs minutes
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the processors
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS

os.environ["HF_HUB_OFFLINE"] = "1"  # a name of a model is looked up in the cache alone
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.devnull  # it writes nothing

import fresh_machine
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on CPU tensors

fresh_machine.begin()  # here, so that it holds for imports of test modules and for fixtures of any scope
