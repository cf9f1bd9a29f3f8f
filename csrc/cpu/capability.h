// Which instruction set the CPU kernels use.
#pragma once

#include <string>
#include <vector>

namespace mooring {

enum class Capability { scalar, avx2, avx512 };

// "scalar", "avx2" or "avx512".
const char* name_of(Capability capability);

// Capabilities that were compiled in and that this CPU runs, weakest first. Never empty.
std::vector<Capability> available_capabilities();

// The one in use: MOORING_CPU if set, else the strongest available one.
// Throws std::invalid_argument if MOORING_CPU names none of the available ones.
Capability active_capability();

// Chooses another one for the rest of the process. Throws std::invalid_argument if it is not available.
void set_capability(const std::string& name);

}  // namespace mooring
