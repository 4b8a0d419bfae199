// libvitrail's C functions: arguments, status codes and messages; model and session do the rest.
#include <cstdio>
#include <new>

#include "session.hpp"
#include "vitrail.h"

struct vitrail_model {
    std::shared_ptr<const vitrail::Model> model;
    bool overlap;
};

struct vitrail_session {
    vitrail::Session session;
};

namespace {

using vitrail::EndpointId;

// A fixed array: reporting that memory ran out must not allocate.
thread_local char message[2048] = "";

vitrail_status fail(vitrail_status status, const char* reason) noexcept {
    std::snprintf(message, sizeof message, "%s", reason);
    return status;
}

// Runs `work` and turns any exception into a status.
template <typename Work>
vitrail_status guarded(Work work) noexcept {
    try {
        work();
        return VITRAIL_OK;
    } catch (const vitrail::DriverError& error) {
        const bool memory = error.code() == vitrail::cu::kOutOfMemory;
        return fail(memory ? VITRAIL_OUT_OF_MEMORY : VITRAIL_DEVICE, error.what());
    } catch (const vitrail::LimitTooSmall& error) {
        return fail(VITRAIL_OUT_OF_MEMORY, error.what());
    } catch (const vitrail::FormatError& error) {
        return fail(VITRAIL_BAD_FOLDER, error.what());
    } catch (const vitrail::NoDevice& error) {
        return fail(VITRAIL_NO_DEVICE, error.what());
    } catch (const vitrail::NotFinite& error) {
        return fail(VITRAIL_NOT_FINITE, error.what());
    } catch (const std::invalid_argument& error) {
        return fail(VITRAIL_INVALID, error.what());
    } catch (const std::bad_alloc&) {
        return fail(VITRAIL_OUT_OF_MEMORY, "the host's memory: got none, wanted more");
    } catch (const std::exception& error) {
        return fail(VITRAIL_FAILED, error.what());
    } catch (...) {
        return fail(VITRAIL_FAILED, "got an unknown error");
    }
}

void want(bool valid, const char* problem) {
    if (!valid) throw std::invalid_argument(problem);
}

void want_call(const vitrail_session* session, const void* items, size_t n, const float* out) {
    want(session != nullptr, "session: got NULL");
    want(n == 0 || items != nullptr, "pixels or ids: got NULL, wanted n items");
    want(n == 0 || out != nullptr, "embeddings or logits: got NULL, wanted room for n");
}

vitrail_status images(vitrail_session* session, EndpointId id, const void* pixels, size_t n,
                      float* out, int32_t* status) noexcept {
    return guarded([&] {
        want_call(session, pixels, n, out);
        session->session.images(id, pixels, n, out, status);
    });
}

}  // namespace

extern "C" {

const char* vitrail_version(void) { return VITRAIL_VERSION; }

const char* vitrail_error(void) { return message; }

vitrail_status vitrail_load(const char* folder, const vitrail_options* options,
                            vitrail_model** model) {
    return guarded([&] {
        want(model != nullptr, "model: got NULL, wanted a pointer to write to");
        *model = nullptr;
        want(folder != nullptr, "folder: got NULL, wanted a path");
        const vitrail_options chosen = options != nullptr ? *options : vitrail_options{};
        want(chosen.device >= 0, "device: got a number below 0");
        auto loaded = std::make_shared<const vitrail::Model>(folder, chosen.driver, chosen.device);
        *model = new vitrail_model{std::move(loaded), chosen.overlap != 0};
    });
}

void vitrail_free(vitrail_model* model) { delete model; }

vitrail_status vitrail_model_facts(const vitrail_model* model, vitrail_facts* facts) {
    return guarded([&] {
        want(model != nullptr && facts != nullptr, "model or facts: got NULL");
        const vitrail::ExportFolder& folder = model->model->folder();
        *facts = {};
        if (folder.vision) {
            facts->image_height = folder.vision->height;
            facts->image_width = folder.vision->width;
            facts->image_channels = folder.vision->channels;
            facts->image_embedding = folder.vision->embedding;
            facts->image_labels = static_cast<uint32_t>(folder.vision->labels.size());
            if (facts->image_labels != 0) facts->image_scores = folder.vision->scores.c_str();
        }
        if (folder.text) {
            facts->text_vocab = folder.text->vocab;
            facts->text_context = folder.text->context;
            facts->text_embedding = folder.text->embedding;
            facts->text_end = folder.text->eos;
        }
        facts->architecture = model->model->arch();
        facts->device = model->model->gpu().info().name.c_str();
        facts->fingerprint = folder.build(facts->architecture).fingerprint.c_str();
    });
}

const char* vitrail_label(const vitrail_model* model, size_t index) {
    if (model == nullptr || !model->model->folder().vision) return nullptr;
    const std::vector<std::string>& labels = model->model->folder().vision->labels;
    return index < labels.size() ? labels[index].c_str() : nullptr;
}

vitrail_status vitrail_session_create(const vitrail_model* model, vitrail_session** session) {
    return guarded([&] {
        want(session != nullptr, "session: got NULL, wanted a pointer to write to");
        *session = nullptr;
        want(model != nullptr, "model: got NULL");
        *session = new vitrail_session{{model->model, model->overlap}};
    });
}

void vitrail_session_free(vitrail_session* session) { delete session; }

vitrail_status vitrail_session_limit(vitrail_session* session, size_t bytes) {
    return guarded([&] {
        want(session != nullptr, "session: got NULL");
        session->session.limit(bytes);
    });
}

size_t vitrail_session_trim(vitrail_session* session) {
    return session != nullptr ? session->session.memory().trim() : 0;
}

size_t vitrail_session_memory(const vitrail_session* session) {
    return session != nullptr ? session->session.memory().bytes() : 0;
}

vitrail_status vitrail_embed_uint8(vitrail_session* session, const uint8_t* pixels, size_t n,
                                   float* embeddings, int32_t* status) {
    return images(session, EndpointId::kUint8, pixels, n, embeddings, status);
}

vitrail_status vitrail_embed_float(vitrail_session* session, const float* pixels, size_t n,
                                   float* embeddings, int32_t* status) {
    return images(session, EndpointId::kFloat, pixels, n, embeddings, status);
}

vitrail_status vitrail_classify_uint8(vitrail_session* session, const uint8_t* pixels, size_t n,
                                      float* logits, int32_t* status) {
    return images(session, EndpointId::kScoresUint8, pixels, n, logits, status);
}

vitrail_status vitrail_classify_float(vitrail_session* session, const float* pixels, size_t n,
                                      float* logits, int32_t* status) {
    return images(session, EndpointId::kScoresFloat, pixels, n, logits, status);
}

vitrail_status vitrail_embed_text(vitrail_session* session, const int32_t* ids, size_t stride,
                                  const int32_t* lengths, size_t n, float* embeddings,
                                  int32_t* status) {
    return guarded([&] {
        want_call(session, ids, n, embeddings);
        session->session.texts(ids, lengths, stride, n, embeddings, status);
    });
}

}  // extern "C"
