// Registers csrc/*.cu for CPU tensors: torch calls the emulated kernels through their schemas
// (test_bindings_on_host.py).
#include <initializer_list>
#include <limits>

#include "grouped_gemm.cu"
#include "peer_memory.cu"
#include "permute.cu"
#include "route_plan.cu"
#include "router.cu"
#include "swiglu.cu"
