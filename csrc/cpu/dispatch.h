// The SIMD level in use; it can be lowered, for tests and for comparisons.
#pragma once

#include <string>
#include <vector>

namespace stylegan_fast::cpu {

std::vector<std::string> simd_levels();
std::string simd_level();
void set_simd_level(const std::string& name);

}  // namespace stylegan_fast::cpu
