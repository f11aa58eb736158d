// ---- the verdict, the facts, and both as Markdown for a bug report ----
function drawHead() {
  $('command').textContent = `minitp ${data.command}`;
  $('title').textContent = document.title = data.title;
  $('verdict').classList.toggle('failed', !data.ok);
  $('verdict').append(h('b', {}, icon(data.ok), data.ok ? 'Passed' : 'Failed'), h('span', {}, h('bdi', {}, data.verdict)));
  $('diagnosis').hidden = !data.diagnosis;
  $('diagnosis').append(h('bdi', {}, data.diagnosis ?? ''));
  for (const list of ['problems', 'warnings']) {
    $(list).hidden = !data[list]?.length;
    $(list).append(...(data[list] ?? []).map(line => h('li', {}, h('bdi', {}, line))));
  }
  $('run').open = !isNarrow();
  $('facts').append(...(data.facts ?? []).map(([key, value]) => h('div', { class: key }, h('dt', {}, h('bdi', {}, key)), h('dd', {},
    value.length <= 160 ? h('bdi', {}, value)
      : h('details', {}, h('summary', {}, h('bdi', {}, value.slice(0, 120), '…')), h('bdi', {}, value))))));
  $('errors-title').textContent = data.layers ? 'Every step' : 'Every tensor';
  if (cells.length) $('summary').append(`${plural(data.compared ?? cells.length, 'comparison')}, ${count(wrong.length)} out of bounds.`);
  const where = cells.length && !wrong.length && closest.bounded?.share > 0;
  if (where) $('summary').append(` Closest to its bound, at ${brief(closest.bounded.share)} of it: `,
    h('span', { class: 'name' }, h('bdi', {}, fullName(closest))), closest.rank === null ? '.' : ` on rank ${closest.rank}.`);
  $('copy').addEventListener('click', copyMarkdown);
}

const MOST_WRONG = 20;  // other wrong steps in the Markdown table
function markdownText(text) {  // one line in which no character of the data acts as markup
  return String(text).replace(/\s+/g, ' ').replace(/[\\`*_{}[\]<>|#~]/g, '\\$&');
}
function markdownTable(titles, lines) {
  const row = columns => `| ${columns.map(markdownText).join(' | ')} |`;
  return [row(titles), `|${titles.map(() => '---|').join('')}`, ...lines.map(row)].join('\n');
}
function fenced(text) {  // a block of code; the fence is longer than any run of backticks in it
  const fence = '`'.repeat(Math.max(3, ...(text.match(/`+/g) ?? []).map(run => run.length + 1)));
  return `${fence}sh\n${text}\n${fence}`;
}
const code = text => `\`${String(text).replace(/[\s`]+/g, ' ')}\``;
function findingMarkdown(cell) {  // the blamed step: where it is, its errors, its worst elements, and the other ranks
  const errors = [['local', cell.local], [comparing ? 'difference' : 'total', cell.total]].filter(([, error]) => error);
  const rank = cell === guilty && data.everywhere ? 'all ranks' : rankName(cell.rank), layer = isWide(cell.row) ? '' : `layer ${cell.row - first}`;
  const parts = [[code(fullName(cell)), layer, rank, cell.kind].filter(Boolean).join(', ')];
  if (noteOf(cell)) parts.push(markdownText(noteOf(cell)));
  const [shape, formula, operation, , source] = explainedBy(stepOf(cell.row, cell.col)) ?? [];
  if (formula) parts.push([formula, shape, operation, source].filter(Boolean).map(code).join(', '));
  if (cell.onlyTotal) parts.push('The local error is within its bound, and the total error is not.');
  parts.push(markdownTable(['error', 'relative', 'bound', 'largest absolute', 'bound'], errors.map(([name, error]) =>
    [name, brief(error.relative), brief(error.bound), brief(error.absolute), brief(error.absoluteBound)])));
  const axes = data.axes[stepOf(cell.row, cell.col)], whole = cell.worst.some(([index]) => wholeIndex(cell, index));
  const titles = [axes ? `index [${axes.replaceAll(' ', ', ')}]` : 'index', ...(whole ? ['index in the tensor'] : []),
    ...(comparing ? ['B', 'A'] : ['value', 'expected']), 'difference'];
  if (cell.worst.length) parts.push(markdownTable(titles, cell.worst.map(([index, value, expected]) => [indexText(index),
    ...(whole ? [indexText(wholeIndex(cell, index))] : []), full(real(value)), full(real(expected)), brief(real(value) - real(expected))])));
  const ranks = onEachRank(cell);
  if (ranks.length > 1) parts.push(markdownTable(['rank', 'local error', 'total error', ''], ranks.map(([, other]) =>
    [String(other.rank), brief(other.local?.relative), brief(other.total?.relative), other.ok ? 'within bounds' : 'wrong'])));
  return parts;
}
function markdown() {
  const said = `**${data.ok ? 'Passed' : 'Failed'}**: ${markdownText(data.verdict)}`;
  const parts = [`### minitp ${data.command}: ${markdownText(data.title)}`, said];
  if (data.diagnosis) parts.push(`**${markdownText(data.diagnosis)}**`);
  if (guilty) parts.push(`#### The first ${fault} step`, ...findingMarkdown(guilty));
  for (const lines of [data.problems, data.warnings]) if (lines?.length) parts.push(lines.map(line => `- ${markdownText(line)}`).join('\n'));
  const others = wrong.filter(cell => cell !== guilty), lines = others.slice(0, MOST_WRONG).map(cell => [fullName(cell),
    ...(data.tp ? [rankName(cell.rank)] : []), brief(cell.bounded?.relative), brief(cell.bounded?.bound), indexText(cell.bounded?.index), cell.note]);
  const titles = ['step', ...(data.tp ? ['rank'] : []), 'relative error', 'bound', 'worst at', 'note'];
  if (lines.length) parts.push(`#### Other ${fault} steps`, markdownTable(titles, lines));
  if (others.length > MOST_WRONG) parts.push(`and ${others.length - MOST_WRONG} more`);
  const command = (data.facts ?? []).find(([name]) => name === 'command')?.[1], facts = (data.facts ?? []).filter(([name]) => name !== 'command');
  parts.push('#### The run', ...(command ? [fenced(command)] : []), markdownTable(['fact', 'value'], facts));
  return parts.join('\n\n') + '\n';
}
async function copyMarkdown() {
  const text = markdown();
  let copied = await (navigator.clipboard?.writeText(text).then(() => true, () => false) ?? false);
  if (!copied) {  // some browsers give a page that was opened from a file no clipboard
    const box = h('textarea', { class: 'away' }, text);
    document.body.append(box);
    box.select();
    copied = document.execCommand('copy');
    box.remove();
  }
  $('copy').textContent = copied ? 'Copied' : 'Could not copy';
  setTimeout(() => { $('copy').textContent = 'Copy as Markdown'; }, 2000);
}
