// Fresh memory is mapped as it is first written. Page by page, that takes several times as long as
// what a kernel computes for it; in huge pages, which Linux gives to who asks, a fraction.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>

#include <cstdlib>
#endif

namespace stylegan_fast::cpu {
namespace {

// It is advice: where the system has no huge pages, or the memory is mapped already, nothing happens.
inline void want_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLeast = 4 << 20;  // surely holds a whole one
  constexpr uintptr_t kPage = 1 << 16;  // the largest page of any processor
  if (bytes < kLeast) return;
  static const char* const variable = std::getenv("STYLEGAN_FAST_HUGE_PAGES");
  if (variable && *variable == '0') return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace stylegan_fast::cpu
