#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace esd::cpu {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512"};

bool supported(Isa level) {
  if (level == Isa::baseline) return true;
#ifdef ESD_X86_ISA_LEVELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa choose() {
  const char* wanted = std::getenv("ESD_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (std::string(wanted) != names[static_cast<int>(level)]) continue;
      if (supported(level)) return level;
      throw std::runtime_error(std::string("ESD_CPU_ISA=") + wanted + ": not supported by this processor or build");
    }
    throw std::runtime_error(std::string("ESD_CPU_ISA=") + wanted + ": use baseline, avx2 or avx512");
  }
  if (supported(Isa::avx512)) return Isa::avx512;
  return supported(Isa::avx2) ? Isa::avx2 : Isa::baseline;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return names[static_cast<int>(isa())]; }

}  // namespace esd::cpu
