// The binding wants CPU kernels too; the module built here has none.
#include "seqpar.h"

namespace seqpar {
namespace cpu {

Status norm_forward(const NormForward&, int) {
    return Status::unsupported;
}
Status norm_backward(const NormBackward&, int) {
    return Status::unsupported;
}
int64_t norm_backward_workspace(const NormBackward&) {
    return 0;
}
Status reduce_shards(const ReduceShards&, int) {
    return Status::unsupported;
}
Status attention_forward(const AttentionForward&, int) {
    return Status::unsupported;
}
Status attention_backward(const AttentionBackward&, int) {
    return Status::unsupported;
}
Status attention_merge(const AttentionMerge&, int) {
    return Status::unsupported;
}
int64_t stream_beyond(int64_t bytes) {
    return bytes;
}
const char* isa() {
    return "none";
}
const char* threading() {
    return "none";
}

}  // namespace cpu
}  // namespace seqpar
