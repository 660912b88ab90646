"""XLA's flags for the tests, of this process and of those that tests start."""

import importlib.metadata

# Most of the time of tiny models goes into compilation, most of which is LLVM's.
_QUICK_COMPILATION = [
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  # In one piece rather than in parallel ones: 10 to 30% less of a compilation.
  '--xla_cpu_parallel_codegen_split_count=1',
  # XLA's checks of its own passes: 5 to 10% of the compilation of a step on a mesh.
  '--xla_disable_hlo_passes=hlo-verifier',
]
# Later versions don't know this flag and would end the process.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _QUICK_COMPILATION.append('--xla_cpu_use_fusion_emitters=false')


def of(devices: int) -> list[str]:
  """Flags for quick compilation on an emulated number of CPU devices."""
  return [f'--xla_force_host_platform_device_count={devices}', *_QUICK_COMPILATION]
