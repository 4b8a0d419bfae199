// setp, selp, slct and logic of predicates (PTX ISA 9.7.6).
#include "lanes.hpp"

namespace emulator {
namespace {

template <class T, class Compare>
u32 compare_lanes(Warp& warp, u32 first, u32 second) {
    const auto* a = lanes_of<T>(warp, first);
    const auto* b = lanes_of<T>(warp, second);
    u32 lanes = 0;
    for (u32 lane = 0; lane < kLanes; ++lane)
        lanes |= u32(Compare()(from_register<T>(a[lane]), from_register<T>(b[lane]))) << lane;
    return lanes;
}

// p|q, a, b: q is the opposite.
template <class T, class Compare>
void set_predicates(Warp& warp, const Instruction& instruction) {
    const u32* operand = instruction.operand;
    const u32 lanes = compare_lanes<T, Compare>(warp, operand[2], operand[3]);
    warp.set_predicate(operand[0], lanes);
    warp.set_predicate(operand[1], ~lanes);
}

enum Logic { kAnd, kOr, kXor };
Logic logic_of(const Warp& warp, const Instruction& instruction) {
    const std::string& name = warp.kernel->opcodes[instruction.opcode];
    const size_t dot = name.find('.', name.find('.') + 1);  // setp.lt.and.s32
    return name[dot + 1] == 'a' ? kAnd : name[dot + 1] == 'o' ? kOr : kXor;
}
inline u32 combine(Logic logic, u32 a, u32 b) {
    return logic == kAnd ? a & b : logic == kOr ? a | b : a ^ b;
}
// p|q, a, b, c: combined with c, the opposite too.
template <class T, class Compare>
void set_combined(Warp& warp, const Instruction& instruction) {
    const u32* operand = instruction.operand;
    const u32 lanes = compare_lanes<T, Compare>(warp, operand[2], operand[3]);
    const u32 other = warp.predicates[operand[4]];
    const Logic logic = logic_of(warp, instruction);
    warp.set_predicate(operand[0], combine(logic, lanes, other));
    warp.set_predicate(operand[1], combine(logic, ~lanes, other));
}

template <Logic logic>
void combine_predicates(Warp& warp, const Instruction& instruction) {
    const u32* operand = instruction.operand;
    warp.set_predicate(operand[0],
                       combine(logic, warp.predicates[operand[1]], warp.predicates[operand[2]]));
}
template <bool inverted>
void copy_predicate(Warp& warp, const Instruction& instruction) {
    const u32 lanes = warp.predicates[instruction.operand[1]];
    warp.set_predicate(instruction.operand[0], inverted ? ~lanes : lanes);
}

template <class T>
void select(Warp& warp, const Instruction& instruction) {
    auto* result = lanes_of<T>(warp, instruction.operand[0]);
    const auto* a = lanes_of<T>(warp, instruction.operand[1]);
    const auto* b = lanes_of<T>(warp, instruction.operand[2]);
    const u32 predicate = warp.predicates[instruction.operand[3]];
    each_lane(warp, [=](u32 lane) { result[lane] = predicate >> lane & 1 ? a[lane] : b[lane]; });
}

#define COMPARISON(name, expression)      \
    struct name {                         \
        template <class T>                \
        bool operator()(T a, T b) const { \
            return expression;            \
        }                                 \
    };
COMPARISON(Equal, a == b)
COMPARISON(NotEqual, a != b && a == a && b == b)
COMPARISON(Less, a < b)
COMPARISON(LessEqual, a <= b)
COMPARISON(Greater, a > b)
COMPARISON(GreaterEqual, a >= b)
COMPARISON(UnorderedEqual, !(a < b || a > b))  // or an operand is NaN
COMPARISON(UnorderedNotEqual, !(a == b))
COMPARISON(UnorderedLess, !(a >= b))
COMPARISON(UnorderedLessEqual, !(a > b))
COMPARISON(UnorderedGreater, !(a <= b))
COMPARISON(UnorderedGreaterEqual, !(a < b))
COMPARISON(BothNumbers, a == a && b == b)
COMPARISON(SomeNan, a != a || b != b)
#undef COMPARISON

template <class T, class Compare>
void add(OpcodeTable& table, const std::string& compare, const std::string& type) {
    const std::string operands = sizeof(T) == 8 ? "pp=RR" : "pp=rr";
    const auto name = [&](const char* logic) { return "setp." + compare + logic + "." + type; };
    table.add(name(""), set_predicates<T, Compare>, operands, kInteger);
    table.add(name(".and"), set_combined<T, Compare>, operands + "p", kInteger);
    table.add(name(".or"), set_combined<T, Compare>, operands + "p", kInteger);
    table.add(name(".xor"), set_combined<T, Compare>, operands + "p", kInteger);
}
template <class T>
void add_equality(OpcodeTable& table, const std::string& type) {
    add<T, Equal>(table, "eq", type);
    add<T, NotEqual>(table, "ne", type);
}
template <class T>
void add_order(OpcodeTable& table, const std::string& type) {
    add_equality<T>(table, type);
    add<T, Less>(table, "lt", type);
    add<T, LessEqual>(table, "le", type);
    add<T, Greater>(table, "gt", type);
    add<T, GreaterEqual>(table, "ge", type);
}
template <class T>
void add_floats(OpcodeTable& table, const std::string& type) {
    add_order<T>(table, type);
    add<T, UnorderedEqual>(table, "equ", type);
    add<T, UnorderedNotEqual>(table, "neu", type);
    add<T, UnorderedLess>(table, "ltu", type);
    add<T, UnorderedLessEqual>(table, "leu", type);
    add<T, UnorderedGreater>(table, "gtu", type);
    add<T, UnorderedGreaterEqual>(table, "geu", type);
    add<T, BothNumbers>(table, "num", type);
    add<T, SomeNan>(table, "nan", type);
}

// Halves compare as the floats that they are.
struct HalfValue {
    u16 bits;
    friend bool operator==(HalfValue a, HalfValue b) { return a.value() == b.value(); }
    friend bool operator!=(HalfValue a, HalfValue b) { return a.value() != b.value(); }
    friend bool operator<(HalfValue a, HalfValue b) { return a.value() < b.value(); }
    friend bool operator<=(HalfValue a, HalfValue b) { return a.value() <= b.value(); }
    friend bool operator>(HalfValue a, HalfValue b) { return a.value() > b.value(); }
    friend bool operator>=(HalfValue a, HalfValue b) { return a.value() >= b.value(); }
    float value() const { return half_to_float(bits); }
};

}  // namespace

void add_comparisons(OpcodeTable& table) {
    add_order<u16>(table, "u16");
    add_order<i16>(table, "s16");
    add_order<u32>(table, "u32");
    add_order<i32>(table, "s32");
    add_order<u64>(table, "u64");
    add_order<i64>(table, "s64");
    add_equality<u16>(table, "b16");
    add_equality<u32>(table, "b32");
    add_equality<u64>(table, "b64");
    add_floats<float>(table, "f32");
    add_floats<float>(table, "ftz.f32");  // subnormals are not flushed
    add_floats<double>(table, "f64");
    add_floats<HalfValue>(table, "f16");
    for (const char* type : {"b16", "u16", "s16", "b32", "u32", "s32", "f32"})
        table.add(std::string("selp.") + type, select<u32>, "r=rrp", kMove);
    for (const char* type : {"b64", "u64", "s64", "f64"})
        table.add(std::string("selp.") + type, select<u64>, "R=RRp", kMove);
    table.add("and.pred", combine_predicates<kAnd>, "p=pp", kInteger);
    table.add("or.pred", combine_predicates<kOr>, "p=pp", kInteger);
    table.add("xor.pred", combine_predicates<kXor>, "p=pp", kInteger);
    table.add("not.pred", copy_predicate<true>, "p=p", kInteger);
    table.add("mov.pred", copy_predicate<false>, "p=p", kMove);
}

}  // namespace emulator
