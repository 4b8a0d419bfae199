// A folder that `vitrail export` wrote: what it says of the model, and its files, whose every byte
// is checked against its digest as it is read. docs/runtime.md has the layout.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "reader.hpp"
#include "sha256.hpp"

namespace vitrail {

constexpr std::string_view kModelMagic = "vitrail model 1\n";
constexpr size_t kChunkBytes = size_t{4} << 20;  // of a file, hashed by one thread

struct File {
    std::string path;  // inside the folder
    uint64_t bytes = 0;
    Digest digest{};  // SHA-256 over the SHA-256 of every chunk
};

struct VisionFacts {
    uint32_t height = 0, width = 0, channels = 0;  // of an image
    uint32_t embedding = 0;
    uint32_t tokens = 0;  // of an image
    std::vector<std::string> labels;  // of the classification head; none without one
    std::string scores;               // what makes probabilities of its logits: see vitrail.h
};

struct TextFacts {
    uint32_t vocab = 0, context = 0, embedding = 0;
    int32_t eos = -1;  // below 0: the first of the highest ids ends a text
};

// `plan`: a number in ExportFolder::files. `table`: where the position table begins in the arena.
struct EndpointFile {
    std::string name;
    uint32_t plan = 0;
    int64_t table = -1;
};

// EndpointId runs on one architecture, 10 * major + minor.
struct Build {
    uint32_t arch = 0;
    std::string fingerprint;  // of the model with these kernels: see vitrail.h
    std::vector<EndpointFile> endpoints;
    std::vector<uint32_t> kernels;  // indices into ExportFolder::files
};

class ExportFolder {
  public:
    // Reads and checks what the folder says; no plans, images or weights yet. Throws FormatError
    // where it is not a folder that Vitrail `version` exported.
    ExportFolder(std::string path, const std::string& version);

    // Throws FormatError, naming what was exported, where `arch` was not.
    const Build& build(uint32_t arch) const;

    // Reads files by their numbers, each once, with up to 16 threads, each of which has one open.
    // `use` is called from any of them with every chunk: which of `numbers`, where in the file,
    // the bytes. Throws what it throws, and FormatError for a file that is missing or not what
    // was exported, maybe only after its chunks were used.
    using ChunkFn = std::function<void(size_t which, uint64_t at, std::string_view bytes)>;
    void read(const std::vector<uint32_t>& numbers, const ChunkFn& use) const;

    // Whole files, in the order of `numbers`.
    std::vector<std::string> read(const std::vector<uint32_t>& numbers) const;

    // Throws FormatError where the header of the weights' file, of which these are the first
    // bytes, has the arena elsewhere.
    void check_header(std::string_view first) const;

    std::string path;
    std::vector<File> files;
    uint32_t weights = 0;       // a number in `files`
    uint64_t arena_offset = 0;  // in that file, to its end
    uint64_t arena_bytes = 0;   // packed weights, then position tables
    uint64_t weight_bytes = 0;  // packed weights alone
    std::optional<VisionFacts> vision;
    std::optional<TextFacts> text;
    std::vector<Build> builds;

  private:
    void parse(Reader& in, const std::string& version);
    void check_numbers(const Reader& in) const;
};

}  // namespace vitrail
