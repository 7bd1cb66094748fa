// Which of the compiled instruction-set levels this processor gets.
#pragma once

namespace esd::cpu {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best level compiled in and supported here, or the one named by ESD_CPU_ISA. Decided once.
Isa isa();
const char* isa_name();

}  // namespace esd::cpu
