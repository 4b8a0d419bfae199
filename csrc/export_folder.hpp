// A folder that `vitrail export` wrote: its record (model.vitrail) and its files. Every byte is
// checked against a digest before it is used. engine/vitrail/exported/format.py has the layout.
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

constexpr size_t kChunkBytes = size_t{4} << 20;  // a thread hashes a chunk of a file at a time

struct File {
    std::string path;  // relative to the folder
    uint64_t bytes = 0;
    Digest digest{};  // SHA-256 over the SHA-256 of every chunk
};

struct VisionFacts {
    uint32_t height = 0, width = 0, channels = 0;  // the size of an image
    uint32_t embedding = 0;
    uint32_t tokens = 0;              // tokens of an image
    std::vector<std::string> labels;  // labels of the classification head; empty without a head
    std::string scores;               // "softmax", "sigmoid" or "none": see vitrail.h
};

struct TextFacts {
    uint32_t vocab = 0, context = 0, embedding = 0;
    int32_t eos = -1;  // the end token; negative: the first of a text's highest ids ends it
};

// The plan of an endpoint. `plan`: index into ExportFolder::files. `table`: offset of the position
// table in the arena; negative for texts.
struct EndpointFile {
    std::string name;
    uint32_t plan = 0;
    int64_t table = -1;
};

// The plans and kernels for one architecture, 10 * major + minor.
struct Build {
    uint32_t arch = 0;
    std::string fingerprint;  // the fingerprint of the model with these kernels
    std::vector<EndpointFile> endpoints;
    std::vector<uint32_t> kernels;  // indices into ExportFolder::files
};

class ExportFolder {
  public:
    // Reads and checks the record; plans, kernels and weights are read later. Throws FormatError
    // for a damaged folder, and for one of other numbers than numbers.hpp has.
    explicit ExportFolder(std::string path);

    // Throws FormatError, naming the exported architectures, if `arch` is none of them.
    const Build& build(uint32_t arch) const;

    // Reads files, given as indices into `files`, with up to 16 threads. The threads call `use` for
    // each chunk with the position in `indices`, the chunk's offset in the file, and its bytes.
    // Throws FormatError for a file that is missing or damaged, possibly after `use` has got some
    // of the file's chunks. Rethrows an exception that `use` throws.
    using ChunkFn = std::function<void(size_t position, uint64_t offset, std::string_view bytes)>;
    void read(const std::vector<uint32_t>& indices, const ChunkFn& use) const;

    // The contents of files, in the order of `indices`.
    std::vector<std::string> read(const std::vector<uint32_t>& indices) const;

    // Throws FormatError unless the first chunk of the weights begins with the header of a
    // safetensors file that holds the arena alone.
    void check_header(std::string_view chunk) const;

    std::string path;
    std::vector<File> files;
    uint32_t weights = 0;       // index into `files`
    uint64_t arena_offset = 0;  // offset in the weights file; the arena ends with the file
    uint64_t arena_bytes = 0;   // packed weights, then position tables
    uint64_t weight_bytes = 0;  // packed weights alone
    std::optional<VisionFacts> vision;
    std::optional<TextFacts> text;
    std::vector<Build> builds;

  private:
    void parse(Reader& in);
    void check(const Reader& in) const;
};

}  // namespace vitrail
