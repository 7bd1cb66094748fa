// Which of the compiled instruction-set levels this processor gets.
#pragma once

namespace esd::cpu {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best level compiled in and supported here, or the one named by ESD_CPU_ISA. Decided once.
Isa isa();
const char* isa_name();

// The table of loops `name` of that level.
#ifdef ESD_X86_ISA_LEVELS
#define ESD_CHOSEN_LOOPS(name) (isa() == Isa::avx512 ? avx512::name : isa() == Isa::avx2 ? avx2::name : baseline::name)
#else
#define ESD_CHOSEN_LOOPS(name) (baseline::name)
#endif

}  // namespace esd::cpu
