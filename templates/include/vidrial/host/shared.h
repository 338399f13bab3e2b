// The CTA's shared memory: the dynamic part, exactly as many bytes as asked for, and the static arrays among the thread-local variables.
#pragma once
#include <cxxabi.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/stat.h>
#include <vidrial/host/counts.h>

namespace vidrial::host {

inline constexpr size_t kGuardBytes = 64 << 10, kReservedBytes = size_t(1) << 33;
inline constexpr int kGuardByte = 0x5a, kPoisonByte = 0xff;
char* shared_base = nullptr;
size_t shared_bytes = 0;
char *static_begin = nullptr, *static_end = nullptr;

// Bytes of the dynamic part that belong to no region: between two of them, so that an overflow from one does not pass for the next.
struct Gap { uint64_t offset, bytes; };
inline std::vector<Gap> gaps;

// Behind the shared memory lie 64 KB of guard, then addresses that fault, so that no 32-bit address reaches anything else.
inline void allocate_shared(size_t bytes) {
  void* const memory = mmap(nullptr, kReservedBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  size_t const usable = (bytes + kGuardBytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  if (memory == MAP_FAILED || mprotect(memory, usable, PROT_READ | PROT_WRITE)) refuse("no memory for %zu bytes of shared memory", bytes);
  shared_base = static_cast<char*>(memory);
  shared_bytes = bytes;
  memset(shared_base + bytes, kGuardByte, usable - bytes);
  poison(shared_base + bytes, usable - bytes);
}

// A static array, in the order of addresses; what lies between one and the next belongs to none.
struct StaticArray { char* first; size_t bytes; std::string name; };
inline std::vector<StaticArray> static_arrays;

template <class Visit>
void for_each_static_gap(Visit visit) {
  for (size_t i = 0; i < static_arrays.size(); ++i) {
    char* const end = static_arrays[i].first + static_arrays[i].bytes;
    char* const next = i + 1 < static_arrays.size() ? static_arrays[i + 1].first : static_end;
    if (end < next) visit(static_arrays[i], end, size_t(next - end));
  }
}

// By the executable's symbols: all thread-local ones from the first zone's array on to the last zone.
inline void find_static_arrays() {
  struct Block { char* first; size_t bytes; } block{nullptr, 0};
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void* found) {
    for (int i = 0; i < info->dlpi_phnum; ++i)
      if (info->dlpi_phdr[i].p_type == PT_TLS) *static_cast<Block*>(found) = {static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
    return 1;  // the executable comes first
  }, &block);
  if (!block.bytes) return;
  int const file = open("/proc/self/exe", O_RDONLY);
  struct stat state;
  if (file < 0 || fstat(file, &state)) refuse("the executable cannot be read, whose symbols say where its static __shared__ arrays lie");
  char const* const image = static_cast<char const*>(mmap(nullptr, size_t(state.st_size), PROT_READ, MAP_PRIVATE, file, 0));
  auto const* const header = reinterpret_cast<ElfW(Ehdr) const*>(image);
  auto const* const sections = reinterpret_cast<ElfW(Shdr) const*>(image + header->e_shoff);
  static_begin = block.first + block.bytes, static_end = block.first;
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    char const* const names = image + sections[sections[s].sh_link].sh_offset;
    auto const* const symbols = reinterpret_cast<ElfW(Sym) const*>(image + sections[s].sh_offset);
    for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; ++i) {
      if (ELF64_ST_TYPE(symbols[i].st_info) != STT_TLS || symbols[i].st_shndx == SHN_UNDEF) continue;
      char* const first = block.first + symbols[i].st_value;
      static_begin = std::min(static_begin, first), static_end = std::max(static_end, first + symbols[i].st_size);
      if (strstr(names + symbols[i].st_name, "vidrial_zone_")) continue;
      int status;
      char* const readable = abi::__cxa_demangle(names + symbols[i].st_name, nullptr, nullptr, &status);
      static_arrays.push_back({first, symbols[i].st_size, readable ? readable : names + symbols[i].st_name});
      free(readable);
    }
  }
  munmap(const_cast<char*>(image), size_t(state.st_size));
  close(file);
  std::sort(static_arrays.begin(), static_arrays.end(), [](StaticArray const& a, StaticArray const& b) { return a.first < b.first; });
  for_each_static_gap([](StaticArray const&, char* first, size_t bytes) {
    memset(first, kGuardByte, bytes);
    poison(first, bytes);
  });
}

// NaN everywhere, as a CTA finds it: what is read before it is written shows.
inline void poison_shared() {
  for (Gap const& g : gaps) unpoison(shared_base + g.offset, g.bytes);
  memset(shared_base, kPoisonByte, shared_bytes);
  for (Gap const& g : gaps) {
    memset(shared_base + g.offset, kGuardByte, g.bytes);
    poison(shared_base + g.offset, g.bytes);
  }
  for (StaticArray const& a : static_arrays) memset(a.first, kPoisonByte, a.bytes);
}

// How far behind an end the first wrong byte lies.
inline std::string behind(size_t bytes) { return bytes ? std::to_string(bytes) + " bytes behind" : "right behind"; }

// The first byte that the CTA wrote in a gap, then as if the gap had never been one.
inline void check_gap(Gap const& g) {
  char* const first = shared_base + g.offset;
  unpoison(first, g.bytes);
  for (size_t i = 0; i < g.bytes; ++i)
    if (first[i] != kGuardByte) refuse("block (%u, %u, %u): shared memory was written %s the end of a region, at offset %zu, where none lies", blockIdx.x, blockIdx.y, blockIdx.z, behind(i).c_str(), size_t(g.offset) + i);
  memset(first, kPoisonByte, g.bytes);
}

inline void check_shared() {
  for (Gap const& g : gaps) check_gap(g);
#if !VIDRIAL_ASAN
  for_each_static_gap([](StaticArray const& before, char* first, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
      if (first[i] != kGuardByte) refuse("block (%u, %u, %u): the static array %s was written %s its end (it has %zu bytes)", blockIdx.x, blockIdx.y, blockIdx.z, before.name.c_str(), behind(i).c_str(), before.bytes);
  });
#endif
  size_t high = shared_bytes;
  while (high && static_cast<unsigned char>(shared_base[high - 1]) == kPoisonByte) --high;
  stats.shared_memory_high_water = std::max(stats.shared_memory_high_water, int64_t(high));
#if !VIDRIAL_ASAN
  for (size_t i = 0; i < kGuardBytes; ++i)
    if (shared_base[shared_bytes + i] != kGuardByte) refuse("block (%u, %u, %u): shared memory was written %s its end (the launch asked for %zu bytes)", blockIdx.x, blockIdx.y, blockIdx.z, behind(i).c_str(), shared_bytes);
#endif
}

inline bool in_shared(void const* p, int bytes) {
  char const* const first = static_cast<char const*>(p);
  for (Gap const& g : gaps)
    if (first < shared_base + g.offset + g.bytes && first + bytes > shared_base + g.offset) return false;
  if (first >= shared_base && first + bytes <= shared_base + shared_bytes) return true;
  for (StaticArray const& a : static_arrays)
    if (first >= a.first && first + bytes <= a.first + a.bytes) return true;
  return false;
}

}  // namespace vidrial::host
