#pragma once

#include <string>

namespace esd::cuda {

// Empty where this build's CUDA runtime can use the driver and a device is there; the reason otherwise.
std::string unavailable();

}  // namespace esd::cuda
