// The module gradmem_kernels.native._cpu, and which instruction set its kernels run on.

#include <string>
#include <vector>

#include "bind.h"

namespace gradmem {

#define GRADMEM_ADDRESS(kernel, Arguments) , kernel
#define GRADMEM_TABLE(isa)                                          \
  namespace isa {                                                   \
  static Kernels table(bool runs) {                                 \
    return {#isa, runs GRADMEM_EACH_KERNEL(GRADMEM_ADDRESS)};       \
  }                                                                 \
  }
#ifdef GRADMEM_X86
GRADMEM_TABLE(avx512)
GRADMEM_TABLE(avx2)
#endif
GRADMEM_TABLE(baseline)

namespace {

// Best first.
const std::vector<Kernels>& tables() {
  static const std::vector<Kernels> all = {
#ifdef GRADMEM_X86
      avx512::table(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")),
      avx2::table(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
      baseline::table(true)};
  return all;
}

const Kernels* chosen = nullptr;

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& table : tables())
    if (table.runs) names.emplace_back(table.isa);
  return names;
}

void use(const std::string& isa) {
  for (const Kernels& table : tables())
    if (table.runs && isa == table.isa) {
      chosen = &table;
      return;
    }
  std::string runs;
  for (const std::string& name : instruction_sets()) runs += (runs.empty() ? "" : ", ") + name;
  throw py::value_error("instruction set: expected one of " + runs + ", got '" + isa + "'");
}

}  // namespace

const Kernels& kernels() { return *chosen; }

}  // namespace gradmem

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Kernels on CPUs, from csrc/cpu.";
  gradmem::use(gradmem::instruction_sets().front());
  module.def("instruction_sets", &gradmem::instruction_sets, "Those that this machine runs, best first.");
  module.def("instruction_set", [] { return gradmem::kernels().isa; }, "The one that kernels run on.");
  module.def("use", &gradmem::use, "Has kernels run on another instruction set; for the whole process.");
  gradmem::bind_attention(module);
  gradmem::bind_cross_entropy(module);
  gradmem::bind_rows(module);
}
