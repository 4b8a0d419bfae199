#include "export_folder.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>

namespace vitrail {

namespace {

constexpr size_t kMaxThreads = 16;
constexpr uint64_t kMaxModelBytes = uint64_t{64} << 20;
constexpr uint64_t kMaxFiles = 1 << 20;
constexpr uint32_t kMaxSide = 1 << 20;  // of what an image, text or embedding is counted in

[[noreturn]] void refuse(const std::string& where, const std::string& why) {
    throw FormatError(where + ": " + why);
}

[[noreturn]] void refuse_errno(const std::string& path) {
    refuse(path, std::system_category().message(errno));
}

// Throws FormatError where there is no file.
uint64_t file_bytes(const std::string& path) {
    struct stat status{};
    if (stat(path.c_str(), &status) != 0) refuse_errno(path);
    if (!S_ISREG(status.st_mode)) refuse(path, "got something else, wanted a file");
    return static_cast<uint64_t>(status.st_size);
}

// A file opened for reading. Throws FormatError where it cannot be.
class InputFile {
  public:
    explicit InputFile(std::string path)
        : path_(std::move(path)), handle_(open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
        if (handle_ < 0) refuse_errno(path_);
    }
    ~InputFile() { close(handle_); }
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;

    void read(char* to, uint64_t at, size_t bytes) const {
        while (bytes > 0) {
            const ssize_t got = pread(handle_, to, bytes, static_cast<off_t>(at));
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) refuse_errno(path_);
            if (got == 0) refuse(path_, "got an end at byte " + std::to_string(at));
            to += got;
            at += static_cast<uint64_t>(got);
            bytes -= static_cast<size_t>(got);
        }
    }

  private:
    const std::string path_;
    const int handle_;
};

std::string read_whole(const std::string& path, uint64_t most) {
    const uint64_t size = file_bytes(path);
    if (size > most) {
        refuse(path,
               "got " + std::to_string(size) + " bytes, wanted at most " + std::to_string(most));
    }
    std::string bytes(static_cast<size_t>(size), '\0');
    InputFile(path).read(bytes.data(), 0, bytes.size());
    return bytes;
}

size_t chunks(uint64_t bytes) {
    return static_cast<size_t>((bytes + kChunkBytes - 1) / kChunkBytes);
}

Digest digest_of(const std::vector<Digest>& each) {
    return sha256(each.data(), each.size() * sizeof(Digest));
}

// Whether model.vitrail is as it was written. Its digest stands in vitrail.json, which is Python's
// and always written alike: it is looked for, not parsed.
void check_digest(const std::string& bytes, const std::string& manifest) {
    std::vector<Digest> each;
    for (size_t at = 0; at < bytes.size(); at += kChunkBytes) {
        each.push_back(sha256(bytes.data() + at, std::min(kChunkBytes, bytes.size() - at)));
    }
    std::string wanted = "\"model.vitrail\": \"";
    for (const uint8_t byte : digest_of(each)) {
        for (const int half : {byte >> 4, byte & 15}) wanted += "0123456789abcdef"[half];
    }
    if (read_whole(manifest, kMaxModelBytes).find(wanted + '"') == std::string::npos) {
        refuse(manifest, "got another digest of model.vitrail than the file has");
    }
}

// Whether a path stays inside the folder it is given in.
bool stays(const std::string& path) {
    if (path.empty() || path.front() == '/' || path.find('\0') != std::string::npos) return false;
    for (size_t start = 0; start <= path.size();) {
        const size_t stop = std::min(path.find('/', start), path.size());
        const std::string part = path.substr(start, stop - start);
        if (part.empty() || part == "." || part == "..") return false;
        start = stop + 1;
    }
    return true;
}

File read_file(Reader& in) {
    File file;
    file.path = in.string();
    file.bytes = in.number<uint64_t>();
    if (!stays(file.path)) in.fail("got a path out of the folder, wanted one in it: " + file.path);
    for (uint8_t& byte : file.digest) byte = in.number<uint8_t>();
    return file;
}

uint32_t side(Reader& in) {
    const auto value = in.number<uint32_t>();
    in.want(value >= 1 && value <= kMaxSide, "a size of 0, or out of range");
    return value;
}

Build read_build(Reader& in) {
    Build build;
    build.arch = in.number<uint32_t>();
    build.fingerprint = in.string();
    build.endpoints = in.list([](Reader& reader) {
        EndpointFile endpoint;
        endpoint.name = reader.string();
        endpoint.plan = reader.number<uint32_t>();
        endpoint.table = reader.number<int64_t>();
        return endpoint;
    });
    build.kernels = in.list([](Reader& reader) { return reader.number<uint32_t>(); });
    return build;
}

std::string arch_name(uint32_t arch) { return "sm_" + std::to_string(arch); }

}  // namespace

// -- what the folder says ------------------------------------------------------------------------

ExportFolder::ExportFolder(std::string folder, const std::string& version)
    : path(std::move(folder)) {
    struct stat status{};
    if (stat(path.c_str(), &status) != 0) refuse_errno(path);
    if (!S_ISDIR(status.st_mode)) refuse(path, "got a file, wanted an exported folder");
    const std::string record = path + "/model.vitrail", manifest = path + "/vitrail.json";
    for (const std::string& wanted : {record, manifest}) {
        if (access(wanted.c_str(), F_OK) == 0) continue;
        refuse(wanted, "got no such file, wanted a folder that `vitrail export` wrote");
    }
    const std::string bytes = read_whole(record, kMaxModelBytes);
    Reader in(bytes, record, kModelMagic);
    check_digest(bytes, manifest);
    parse(in, version);
}

void ExportFolder::parse(Reader& in, const std::string& version) {
    const std::string theirs = in.string();
    if (theirs != version) {
        in.fail("got an export by Vitrail " + theirs + ", wanted one by " + version);
    }
    files = in.list(read_file);
    weights = in.number<uint32_t>();
    arena_offset = in.number<uint64_t>();
    arena_bytes = in.number<uint64_t>();
    weight_bytes = in.number<uint64_t>();
    if (in.number<uint8_t>() != 0) {
        vision.emplace();
        for (uint32_t* number : {&vision->height, &vision->width, &vision->channels,
                                 &vision->embedding, &vision->tokens}) {
            *number = side(in);
        }
        vision->labels = in.list([](Reader& reader) { return reader.string(); });
        vision->scores = in.string();
    }
    if (in.number<uint8_t>() != 0) {
        text.emplace();
        for (uint32_t* number : {&text->vocab, &text->context, &text->embedding}) {
            *number = side(in);
        }
        text->eos = in.number<int32_t>();
    }
    builds = in.list(read_build);
    in.end();
    check_numbers(in);
}

void ExportFolder::check_numbers(const Reader& in) const {
    const auto listed = [&](uint32_t number) {
        in.want(number < files.size(), "a file that is not listed");
    };
    in.want(files.size() <= kMaxFiles, "too many files");
    in.want(vision || text, "no model for images and none for texts");
    listed(weights);
    const uint64_t whole = files[weights].bytes;
    in.want(arena_offset <= whole && whole - arena_offset == arena_bytes,
            "an arena that does not end where its file does");
    in.want(weight_bytes > 0 && weight_bytes <= arena_bytes, "weights larger than the arena");
    for (const Build& build : builds) {
        for (const uint32_t kernel : build.kernels) listed(kernel);
        for (const EndpointFile& endpoint : build.endpoints) {
            listed(endpoint.plan);
            const bool image = endpoint.name == "image.uint8" || endpoint.name == "image.float";
            const bool scores = endpoint.name == "scores.uint8" || endpoint.name == "scores.float";
            const bool pixels = image || scores;
            in.want(pixels ? vision && !(scores && vision->labels.empty())
                           : endpoint.name == "text" && text,
                    "an endpoint for an input that the model does not take");
            in.want(!pixels || (endpoint.table % 16 == 0 && endpoint.table >= 0 &&
                                static_cast<uint64_t>(endpoint.table) >= weight_bytes &&
                                static_cast<uint64_t>(endpoint.table) < arena_bytes),
                    "a position table outside the arena");
        }
    }
}

const Build& ExportFolder::build(uint32_t arch) const {
    std::string known;
    for (const Build& build : builds) {
        if (build.arch == arch) return build;
        known += (known.empty() ? "" : ", ") + arch_name(build.arch);
    }
    refuse(path, "got an export for " + (known.empty() ? "no architecture" : known) + ", wanted " +
                     arch_name(arch) + ", which this device is");
}

// A safetensors file: 8 bytes of the header's length, the header, the tensors.
void ExportFolder::check_header(std::string_view first) const {
    const std::string file = path + "/" + files[weights].path;
    uint64_t length = 0;
    if (first.size() < sizeof length) refuse(file, "got no safetensors header");
    std::memcpy(&length, first.data(), sizeof length);
    if (arena_offset < sizeof length || length != arena_offset - sizeof length) {
        refuse(file, "got a header of " + std::to_string(length) + " bytes, wanted one that ends " +
                         "where the arena begins, at byte " + std::to_string(arena_offset));
    }
    if (first.size() < arena_offset) refuse(file, "got a header longer than a chunk");
    std::string header(first.substr(sizeof length, static_cast<size_t>(length)));
    header.erase(std::remove(header.begin(), header.end(), ' '), header.end());
    const std::string wanted = "\"data_offsets\":[0," + std::to_string(arena_bytes) + "]";
    if (header.find("\"arena\":{") == std::string::npos ||
        header.find(wanted) == std::string::npos) {
        refuse(file, "got another tensor in the header, wanted arena with " + wanted);
    }
}

// -- its files -----------------------------------------------------------------------------------

namespace {

// One call of ExportFolder::read: what the threads share.
class ParallelRead {
  public:
    ParallelRead(const ExportFolder& folder, const std::vector<uint32_t>& numbers,
                 const ExportFolder::ChunkFn& use)
        : use_(use) {
        for (const uint32_t number : numbers) {
            const File& file = folder.files[number];
            const std::string& path = paths_.emplace_back(folder.path + "/" + file.path);
            const uint64_t bytes = file_bytes(path);
            if (bytes != file.bytes) {
                refuse(path, "got " + std::to_string(bytes) + " bytes, wanted " +
                                 std::to_string(file.bytes));
            }
            bytes_.push_back(bytes);
            digests_.emplace_back(chunks(bytes));
            for (size_t i = 0; i < chunks(bytes); ++i) jobs_.emplace_back(digests_.size() - 1, i);
        }
    }

    void run() {
        const size_t cores = std::max(1u, std::thread::hardware_concurrency());
        const size_t wanted = std::min({kMaxThreads, cores, jobs_.size()});
        std::vector<std::thread> others;
        try {
            others.reserve(wanted);
            while (others.size() + 1 < wanted) others.emplace_back([this] { work(); });
        } catch (...) {  // no more threads, or no memory for them: those that there are do it
        }
        work();
        for (std::thread& other : others) other.join();
        if (error_) std::rethrow_exception(error_);
    }

    Digest digest(size_t which) const { return digest_of(digests_[which]); }

  private:
    void work() noexcept {
        try {
            const std::unique_ptr<char[]> buffer(new char[kChunkBytes]);  // not filled with zeros
            std::optional<InputFile> file;  // of the job before
            size_t opened = 0;
            for (size_t next; (next = next_.fetch_add(1)) < jobs_.size();) {
                const auto [which, chunk] = jobs_[next];
                const uint64_t at = uint64_t{chunk} * kChunkBytes;
                const uint64_t left = bytes_[which] - at;
                const auto bytes = static_cast<size_t>(std::min<uint64_t>(left, kChunkBytes));
                if (!file || opened != which) file.emplace(paths_[which]);
                opened = which;
                file->read(buffer.get(), at, bytes);
                digests_[which][chunk] = sha256(buffer.get(), bytes);
                use_(which, at, {buffer.get(), bytes});
            }
        } catch (...) {
            next_ = jobs_.size();  // the others stop too
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
    }

    const ExportFolder::ChunkFn& use_;
    std::vector<std::string> paths_;
    std::vector<uint64_t> bytes_;
    std::vector<std::vector<Digest>> digests_;  // by file and chunk
    std::vector<std::pair<size_t, size_t>> jobs_;  // file, chunk
    std::atomic<size_t> next_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;  // of the first that failed; read once all have ended
};

}  // namespace

void ExportFolder::read(const std::vector<uint32_t>& numbers, const ChunkFn& use) const {
    ParallelRead reading(*this, numbers, use);
    reading.run();
    for (size_t which = 0; which < numbers.size(); ++which) {
        const File& file = files[numbers[which]];
        if (reading.digest(which) != file.digest) {
            refuse(path + "/" + file.path, "got other bytes than were exported");
        }
    }
}

std::vector<std::string> ExportFolder::read(const std::vector<uint32_t>& numbers) const {
    std::vector<std::string> whole(numbers.size());
    for (size_t which = 0; which < numbers.size(); ++which) {
        const File& file = files[numbers[which]];
        // the size is believed only once the file has been seen to have it
        const uint64_t there = file_bytes(path + "/" + file.path);
        whole[which].resize(static_cast<size_t>(std::min(there, file.bytes)));
    }
    read(numbers, [&](size_t which, uint64_t at, std::string_view bytes) {
        if (at + bytes.size() > whole[which].size()) {
            refuse(files[numbers[which]].path, "got a file that grows");
        }
        std::memcpy(whole[which].data() + at, bytes.data(), bytes.size());
    });
    return whole;
}

}  // namespace vitrail
