// Spreads the rows over threads. Every number is computed by itself, so their count changes nothing.
#include "cpu/geglu.h"

#include <algorithm>

#include "cpu/geglu_loops.h"
#include "cpu/isa.h"

namespace esd::cpu {
namespace {

constexpr std::int64_t chunk = 8192;           // elements a thread takes at once, whole rows
constexpr std::int64_t parallel_from = 16384;  // below this many elements, waking a thread costs more

void spread(void (*run)(const GegluArgs&, std::int64_t, std::int64_t), const GegluArgs& args, int threads) {
  const std::int64_t rows = std::max<std::int64_t>(1, chunk / args.width);
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * args.width >= parallel_from)
  for (std::int64_t begin = 0; begin < args.rows; begin += rows) run(args, begin, std::min(begin + rows, args.rows));
}

const GegluLoops& loops() { return ESD_CHOSEN_LOOPS(geglu_loops); }

}  // namespace

void geglu(const GegluArgs& args, int threads) { spread(loops().forward, args, threads); }
void geglu_backward(const GegluArgs& args, int threads) { spread(loops().backward, args, threads); }

}  // namespace esd::cpu
