// Embeds pictures with an exported model, without Python, and prints each picture's similarity to
// the first.
//
//     embed [--driver PATH] FOLDER PICTURE.ppm...
//
// FOLDER: the output of `vitrail export`. Pictures are binary PPM (P6) of any size. Each is cropped
// to the square in its middle and resized to the model's size by nearest neighbor, which is enough
// for an example. (vitrail.load(...).preprocess resizes like the checkpoint's authors.)
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "vitrail.h"

namespace {

struct Picture {
    size_t height = 0, width = 0;
    std::vector<uint8_t> pixels;  // (height, width, 3)
};

// The next number of the header. Comments begin with # and end with the line.
size_t number(const std::vector<char>& bytes, size_t& at) {
    while (at < bytes.size() && (std::isspace(bytes[at]) != 0 || bytes[at] == '#')) {
        if (bytes[at] == '#') {
            while (at < bytes.size() && bytes[at] != '\n') ++at;
        } else {
            ++at;
        }
    }
    size_t value = 0;
    for (; at < bytes.size() && std::isdigit(bytes[at]) != 0 && value < 100000; ++at) {
        value = 10 * value + static_cast<size_t>(bytes[at] - '0');
    }
    return value;
}

Picture read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    if (bytes.size() < 2 || bytes[0] != 'P' || bytes[1] != '6') {
        throw std::runtime_error(path + ": not a binary PPM");
    }
    size_t at = 2;
    Picture picture;
    picture.width = number(bytes, at);
    picture.height = number(bytes, at);
    const size_t max_value = number(bytes, at);
    const size_t size = 3 * picture.width * picture.height;
    if (size == 0 || max_value != 255 || bytes.size() - at < size + 1) {
        throw std::runtime_error(path + ": not a whole PPM of 8 bits");
    }
    picture.pixels.assign(bytes.end() - static_cast<std::ptrdiff_t>(bytes.size() - at - 1),
                          bytes.end());
    return picture;
}

// Appends the square in the picture's middle, at the model's size.
void add(const Picture& picture, const vitrail_facts& facts, std::vector<uint8_t>& pixels) {
    const size_t side = std::min(picture.height, picture.width);
    const size_t top = (picture.height - side) / 2, left = (picture.width - side) / 2;
    for (size_t y = 0; y < facts.image_height; ++y) {
        for (size_t x = 0; x < facts.image_width; ++x) {
            const size_t row = top + y * side / facts.image_height;
            const size_t column = left + x * side / facts.image_width;
            const uint8_t* pixel = &picture.pixels[3 * (row * picture.width + column)];
            pixels.insert(pixels.end(), pixel, pixel + 3);
        }
    }
}

double cosine(const float* a, const float* b, size_t n) {
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < n; ++i) {
        ab += double{a[i]} * b[i];
        aa += double{a[i]} * a[i];
        bb += double{b[i]} * b[i];
    }
    return ab / std::sqrt(aa * bb);
}

void check(vitrail_status status) {
    if (status != VITRAIL_OK) throw std::runtime_error(vitrail_error());
}

int run(const char* driver, const char* folder, const std::vector<std::string>& paths) {
    const vitrail_options options{0, driver, 0};
    vitrail_model* model = nullptr;
    check(vitrail_load(folder, &options, &model));
    vitrail_facts facts;
    check(vitrail_model_facts(model, &facts));
    std::printf("%s on %s, sm_%u\n", folder, facts.device, facts.architecture);
    if (facts.image_channels != 3) throw std::runtime_error("the model takes no color images");

    std::vector<uint8_t> pixels;
    for (const std::string& path : paths) add(read(path), facts, pixels);
    std::vector<float> embeddings(paths.size() * facts.image_embedding);
    std::vector<int32_t> status(paths.size());
    vitrail_session* session = nullptr;
    check(vitrail_session_create(model, &session));
    check(vitrail_embed_uint8(session, pixels.data(), paths.size(), embeddings.data(),
                              status.data()));
    for (size_t i = 0; i < paths.size(); ++i) {
        const float* embedding = embeddings.data() + i * facts.image_embedding;
        std::printf("%s: %8.5f %8.5f %8.5f ... similarity to the first %.4f%s\n", paths[i].c_str(),
                    embedding[0], embedding[1], embedding[2],
                    cosine(embeddings.data(), embedding, facts.image_embedding),
                    status[i] == 0 ? "" : " (not finite)");
    }
    vitrail_session_free(session);
    vitrail_free(model);
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    const char* driver = nullptr;
    int at = 1;
    if (count > 2 && std::strcmp(arguments[1], "--driver") == 0) {
        driver = arguments[2];
        at = 3;
    }
    if (count - at < 2) {
        std::fprintf(stderr, "embed [--driver PATH] FOLDER PICTURE.ppm...\n");
        return 2;
    }
    try {
        return run(driver, arguments[at], {arguments + at + 1, arguments + count});
    } catch (const std::exception& error) {
        std::fprintf(stderr, "embed: %s\n", error.what());
        return 1;
    }
}
