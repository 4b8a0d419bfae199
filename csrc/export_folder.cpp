#include "export_folder.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <filesystem>
#include <memory>
#include <system_error>
#include <thread>

#include "numbers.hpp"

namespace vitrail {

namespace {

constexpr std::string_view kMagic = "vitrail export\n";
constexpr std::string_view kUnnumbered = "vitrail export 2\n";  // before heads had the two numbers
constexpr uint32_t kUnnumberedGrammar = 2;
constexpr size_t kMaxThreads = 16;
constexpr uint64_t kMaxRecordBytes = uint64_t{64} << 20;
constexpr uint64_t kMaxFiles = 1 << 20;
constexpr uint32_t kMaxSide = 1 << 20;  // of images, texts and embeddings, in pixels, ids, numbers

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
    throw FormatError(path + ": " + why);
}

[[noreturn]] void refuse_errno(const std::string& path) {
    refuse(path, std::system_category().message(errno));
}

uint64_t file_bytes(const std::string& path) {
    struct stat status{};
    if (stat(path.c_str(), &status) != 0) refuse_errno(path);
    if (!S_ISREG(status.st_mode)) refuse(path, "got something else, wanted a file");
    return static_cast<uint64_t>(status.st_size);
}

// A file that is open for reading. Throws FormatError if it cannot be opened or read.
class InputFile {
  public:
    explicit InputFile(std::string path)
        : path_(std::move(path)), handle_(open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
        if (handle_ < 0) refuse_errno(path_);
    }
    ~InputFile() { close(handle_); }
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;

    void read(char* destination, uint64_t offset, size_t bytes) const {
        while (bytes > 0) {
            const ssize_t count = pread(handle_, destination, bytes, static_cast<off_t>(offset));
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) refuse_errno(path_);
            if (count == 0) refuse(path_, "got an end at byte " + std::to_string(offset));
            destination += count;
            offset += static_cast<uint64_t>(count);
            bytes -= static_cast<size_t>(count);
        }
    }

  private:
    const std::string path_;
    const int handle_;
};

std::string read_file(const std::string& path) {
    if (access(path.c_str(), F_OK) != 0) {
        refuse(path, "got no such file, wanted a folder that `vitrail export` wrote");
    }
    const uint64_t size = file_bytes(path);
    if (size > kMaxRecordBytes) {
        refuse(path, "got " + std::to_string(size) + " bytes, wanted at most " +
                         std::to_string(kMaxRecordBytes));
    }
    std::string bytes(static_cast<size_t>(size), '\0');
    InputFile(path).read(bytes.data(), 0, bytes.size());
    return bytes;
}

// Whether a path is relative and stays inside its folder.
bool is_inside(const std::string& name) {
    const std::filesystem::path path(name);
    if (path.empty() || path.is_absolute() || name.find('\0') != std::string::npos) return false;
    const std::string first = *path.begin();
    return path.lexically_normal().string() == name && first != "." && first != "..";
}

Digest read_digest(Reader& in) {
    Digest digest;
    for (uint8_t& byte : digest) byte = in.number<uint8_t>();
    return digest;
}

File read_entry(Reader& in) {
    File file;
    file.path = in.string();
    in.read(file.bytes);
    file.digest = read_digest(in);
    if (!is_inside(file.path)) {
        in.fail("got a path out of the folder, wanted one in it: " + file.path);
    }
    return file;
}

uint32_t read_side(Reader& in) {
    const auto side = in.number<uint32_t>();
    in.want(side >= 1 && side <= kMaxSide, "a size of 0, or out of range");
    return side;
}

std::string read_string(Reader& in) { return in.string(); }

VisionFacts read_vision(Reader& in) {
    VisionFacts facts;
    for (uint32_t* side :
         {&facts.height, &facts.width, &facts.channels, &facts.embedding, &facts.tokens}) {
        *side = read_side(in);
    }
    facts.labels = in.list(read_string);
    facts.scores = in.string();
    return facts;
}

TextFacts read_text(Reader& in) {
    TextFacts facts;
    for (uint32_t* side : {&facts.vocab, &facts.context, &facts.embedding}) *side = read_side(in);
    in.read(facts.eos);
    return facts;
}

Build read_build(Reader& in) {
    Build build;
    in.read(build.arch);
    build.fingerprint = in.string();
    build.endpoints = in.list([](Reader& reader) {
        EndpointFile endpoint;
        endpoint.name = reader.string();
        reader.read(endpoint.plan, endpoint.table);
        return endpoint;
    });
    build.kernels = in.list([](Reader& reader) { return reader.number<uint32_t>(); });
    return build;
}

// The head of a record, whose layout never changes: vitrail/exported/head.py describes it.
// Throws FormatError for a folder of other numbers. `numbered`: whether the head has them.
void read_head(Reader& in, bool numbered) {
    const Digest digest = read_digest(in);
    const std::string_view rest = in.rest();
    in.want(sha256(rest.data(), rest.size()) == digest, "bytes that do not match their digest");
    const auto grammar = numbered ? in.number<uint32_t>() : kUnnumberedGrammar;
    const auto abi = numbered ? in.number<uint32_t>() : 0;
    const std::string version = in.string();
    if (grammar == kPlanGrammar && abi == kKernelAbi) return;
    const auto say = [](uint32_t grammar_number, const std::string& abi_number) {
        return "plan grammar " + std::to_string(grammar_number) + " and " + abi_number;
    };
    const std::string theirs = numbered ? "kernel ABI " + std::to_string(abi) : "no kernel ABI";
    in.fail("got " + say(grammar, theirs) + ", exported by Vitrail " + version + ", wanted " +
            say(kPlanGrammar, "kernel ABI " + std::to_string(kKernelAbi)) + ", which Vitrail " +
            VITRAIL_VERSION + " reads: export the checkpoint again with it, or load the folder " +
            "with a version that has the folder's two numbers");
}

std::string arch_name(uint32_t arch) { return "sm_" + std::to_string(arch); }

}  // namespace

// -- the record ----------------------------------------------------------------------------------

ExportFolder::ExportFolder(std::string folder) : path(std::move(folder)) {
    struct stat status{};
    if (stat(path.c_str(), &status) != 0) refuse_errno(path);
    if (!S_ISDIR(status.st_mode)) refuse(path, "got a file, wanted an exported folder");
    const std::string name = path + "/model.vitrail", bytes = read_file(name);
    const bool numbered = bytes.compare(0, kUnnumbered.size(), kUnnumbered) != 0;
    Reader in(bytes, name, numbered ? kMagic : kUnnumbered);
    read_head(in, numbered);
    parse(in);
}

void ExportFolder::parse(Reader& in) {
    const std::string summary = path + "/vitrail.json";  // written last: the export is complete
    if (read_file(summary) != in.bytes()) {
        refuse(summary, "got other bytes than the copy in model.vitrail");
    }
    files = in.list(read_entry);
    in.read(weights, arena_offset, arena_bytes, weight_bytes);
    if (in.number<uint8_t>() != 0) vision = read_vision(in);
    if (in.number<uint8_t>() != 0) text = read_text(in);
    builds = in.list(read_build);
    in.end();
    check(in);
}

void ExportFolder::check(const Reader& in) const {
    const auto check_index = [&](uint32_t index) {
        in.want(index < files.size(), "a file that is not listed");
    };
    in.want(files.size() <= kMaxFiles, "too many files");
    in.want(vision || text, "a model that takes neither images nor texts");
    check_index(weights);
    const uint64_t size = files[weights].bytes;
    in.want(arena_offset <= size && size - arena_offset == arena_bytes,
            "an arena that does not end with its file");
    in.want(arena_offset <= kChunkBytes, "a header of the weights longer than a chunk");
    in.want(weight_bytes > 0 && weight_bytes <= arena_bytes, "weights larger than the arena");
    for (const Build& build : builds) {
        for (const uint32_t kernel : build.kernels) check_index(kernel);
        for (const EndpointFile& endpoint : build.endpoints) {
            check_index(endpoint.plan);
            const std::string& name = endpoint.name;
            const bool image = name == "image.uint8" || name == "image.float";
            const bool scores = name == "scores.uint8" || name == "scores.float";
            const bool pixels = image || scores;
            in.want(pixels ? vision && !(scores && vision->labels.empty()) : name == "text" && text,
                    "an endpoint for an input that the model does not take");
            const auto table = static_cast<uint64_t>(endpoint.table);
            in.want(!pixels || (endpoint.table >= 0 && table % 16 == 0 && table >= weight_bytes &&
                                table < arena_bytes),
                    "a position table outside the arena");
        }
    }
}

const Build& ExportFolder::build(uint32_t arch) const {
    std::string exported;
    for (const Build& build : builds) {
        if (build.arch == arch) return build;
        exported += (exported.empty() ? "" : ", ") + arch_name(build.arch);
    }
    refuse(path, "got an export for " + (exported.empty() ? "no architecture" : exported) +
                     ", wanted " + arch_name(arch) + ", which this device is");
}

// A safetensors file is the header's length in 8 bytes, the header, then the tensors.
void ExportFolder::check_header(std::string_view chunk) const {
    const std::string size = std::to_string(arena_bytes);
    std::string header =
        R"({"arena":{"dtype":"U8","shape":[)" + size + R"(],"data_offsets":[0,)" + size + "]}}";
    const uint64_t length = arena_offset - std::min<uint64_t>(arena_offset, sizeof length);
    header.resize(static_cast<size_t>(length), ' ');
    header.insert(0, reinterpret_cast<const char*>(&length), sizeof length);
    if (chunk.substr(0, static_cast<size_t>(arena_offset)) != header) {
        refuse(path + "/" + files[weights].path,
               "got another header, wanted one tensor of " + size + " bytes");
    }
}

// -- files ---------------------------------------------------------------------------------------

namespace {

// One call of ExportFolder::read. Its threads take chunks until none is left.
class ParallelRead {
  public:
    ParallelRead(const ExportFolder& folder, const std::vector<uint32_t>& indices,
                 const ExportFolder::ChunkFn& use)
        : use_(use) {
        for (const uint32_t index : indices) {
            const File& file = folder.files[index];
            const std::string& path = paths_.emplace_back(folder.path + "/" + file.path);
            const uint64_t bytes = file_bytes(path);
            if (bytes != file.bytes) {
                refuse(path, "got " + std::to_string(bytes) + " bytes, wanted " +
                                 std::to_string(file.bytes));
            }
            const auto chunks = static_cast<size_t>((bytes + kChunkBytes - 1) / kChunkBytes);
            for (size_t i = 0; i < chunks; ++i) chunks_.emplace_back(bytes_.size(), i);
            bytes_.push_back(bytes);
            digests_.emplace_back(chunks);
        }
    }

    void run() {
        const size_t cores = std::max(1u, std::thread::hardware_concurrency());
        const size_t count = std::min({kMaxThreads, cores, chunks_.size()});
        std::vector<std::thread> helpers;
        try {
            helpers.reserve(count);
            while (helpers.size() + 1 < count) helpers.emplace_back([this] { work(); });
        } catch (...) {  // no more threads, or no memory for them: fewer threads do the work
        }
        work();
        for (std::thread& helper : helpers) helper.join();
        if (error_) std::rethrow_exception(error_);
    }

    Digest digest(size_t position) const {
        const std::vector<Digest>& chunks = digests_[position];
        return sha256(chunks.data(), chunks.size() * sizeof(Digest));
    }

  private:
    void work() noexcept {
        try {
            const std::unique_ptr<char[]> buffer(new char[kChunkBytes]);  // not zero-filled
            std::optional<InputFile> file;  // of this thread's previous chunk
            size_t opened = 0;
            for (size_t next; (next = next_.fetch_add(1)) < chunks_.size();) {
                const auto [position, chunk] = chunks_[next];
                const uint64_t offset = uint64_t{chunk} * kChunkBytes;
                const auto bytes =
                    static_cast<size_t>(std::min<uint64_t>(bytes_[position] - offset, kChunkBytes));
                if (!file || opened != position) file.emplace(paths_[position]);
                opened = position;
                file->read(buffer.get(), offset, bytes);
                digests_[position][chunk] = sha256(buffer.get(), bytes);
                use_(position, offset, {buffer.get(), bytes});
            }
        } catch (...) {
            next_ = chunks_.size();  // the other threads stop too
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
    }

    const ExportFolder::ChunkFn& use_;
    std::vector<std::string> paths_;
    std::vector<uint64_t> bytes_;
    std::vector<std::vector<Digest>> digests_;       // by position and chunk
    std::vector<std::pair<size_t, size_t>> chunks_;  // position, chunk
    std::atomic<size_t> next_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;  // of the first failure; read after all threads have ended
};

}  // namespace

void ExportFolder::read(const std::vector<uint32_t>& indices, const ChunkFn& use) const {
    ParallelRead parallel(*this, indices, use);
    parallel.run();
    for (size_t position = 0; position < indices.size(); ++position) {
        const File& file = files[indices[position]];
        if (parallel.digest(position) != file.digest) {
            refuse(path + "/" + file.path, "got other bytes than were exported");
        }
    }
}

std::vector<std::string> ExportFolder::read(const std::vector<uint32_t>& indices) const {
    std::vector<std::string> contents(indices.size());
    for (size_t position = 0; position < indices.size(); ++position) {
        const File& file = files[indices[position]];
        // a wrong size in the record must not allocate more memory than the file has bytes
        const uint64_t bytes = file_bytes(path + "/" + file.path);
        contents[position].resize(static_cast<size_t>(std::min(bytes, file.bytes)));
    }
    read(indices, [&](size_t position, uint64_t offset, std::string_view bytes) {
        if (offset + bytes.size() > contents[position].size()) {
            refuse(files[indices[position]].path, "got a file that grows");
        }
        std::memcpy(contents[position].data() + offset, bytes.data(), bytes.size());
    });
    return contents;
}

}  // namespace vitrail
