// Cuts the samples into chunks and spreads them over threads. Every number is computed by itself, so their
// count changes nothing.
#include "cpu/guided_step.h"

#include <algorithm>

#include "cpu/guided_step_loops.h"
#include "cpu/isa.h"

namespace esd::cpu {
namespace {

constexpr std::int64_t chunk = 4096;
constexpr std::int64_t parallel_from = 65536;  // below this many elements read, waking a thread costs more

}  // namespace

void guided_step(const GuidedStepArgs& args, int threads) {
  const GuidedStepLoop run = ESD_CHOSEN_LOOPS(guided_step);
  const std::int64_t chunks = (args.elements + chunk - 1) / chunk;  // of one sample
  const std::int64_t total = args.batch * chunks;
  [[maybe_unused]] const bool pays = args.batch * args.elements * (args.call + 2) >= parallel_from;
#pragma omp parallel for schedule(static) num_threads(threads) if (pays)
  for (std::int64_t task = 0; task < total; ++task) {
    const std::int64_t begin = task % chunks * chunk;
    run(args, task / chunks, begin, std::min(begin + chunk, args.elements));
  }
}

}  // namespace esd::cpu
