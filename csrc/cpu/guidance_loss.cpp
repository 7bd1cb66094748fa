// Cuts the samples into chunks, spreads the chunks over threads, and adds their sums up in a fixed order:
// the result does not depend on the number of threads.
#include "cpu/guidance_loss.h"

#include <algorithm>
#include <vector>

#include "cpu/guidance_loss_loops.h"
#include "cpu/isa.h"

namespace esd::cpu {
namespace {

constexpr std::int64_t chunk = 4096;
constexpr std::int64_t parallel_from = 32768;  // below this many elements, waking a thread costs more

}  // namespace

void guidance_loss(const GuidanceLossArgs& args, int threads) {
  const GuidanceLossLoop run = ESD_CHOSEN_LOOPS(guidance_loss);
  const std::int64_t chunks = (args.elements + chunk - 1) / chunk;  // of one sample
  const std::int64_t total = args.batch * chunks;
  std::vector<double> sums(static_cast<std::size_t>(total));

#pragma omp parallel for schedule(static) num_threads(threads) if (args.batch * args.elements >= parallel_from)
  for (std::int64_t task = 0; task < total; ++task) {
    const std::int64_t begin = task % chunks * chunk;
    sums[static_cast<std::size_t>(task)] = run(args, task / chunks, begin, std::min(begin + chunk, args.elements));
  }

  double loss = 0;
  for (std::int64_t b = 0; b < args.batch; ++b) {
    double sum = 0;
    for (std::int64_t c = 0; c < chunks; ++c) sum += sums[static_cast<std::size_t>(b * chunks + c)];
    const double per_sample = double(args.weight[b]) * sum / double(args.elements);
    args.per_sample[b] = float(per_sample);
    loss += per_sample;
  }
  *args.loss = float(loss / double(args.batch));
}

}  // namespace esd::cpu
